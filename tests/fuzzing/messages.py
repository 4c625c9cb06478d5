"""Messages that make no sense, to workers and to the launcher: each ends as it is meant to, or is obeyed."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from random import Random
from time import monotonic, sleep
from typing import TYPE_CHECKING

import msgpack

from fuzzing.guest import BrokenPromise
from lgmp.bus import LguestBus
from lgmp.errors import LgmpError
from lgmp.mailbox import (
    COMPLETION_MESSAGE_BYTES,
    MAILBOX_MESSAGE_BYTES,
    MAILBOX_MESSAGES,
    ToLauncher,
    ToWorker,
    create_pair,
    pack,
    unpack,
)
from lgmp.memory import GuestMemory
from lgmp.supervisor import Supervisor, WorkerSpecification
from lgmp.supervisor import Worker as LaunchersWorker
from lgmp.testing import PATIENCE, Driver, Unexpected, WorkerProcess
from lgmp.virtio import ids
from lgmp.waker import Waker
from workers.device import Device
from workers.runtime import Options, Worker

if TYPE_CHECKING:
    from collections.abc import Sequence

_NUMBERS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 127, 128, 255, 256, -1, -(1 << 63), (1 << 64) - 1)


def message(random: Random, room: int, kinds: Sequence[int]) -> bytes:
    """Bytes for a queue whose messages have `room` bytes: a message, nearly one, or noise."""
    if random.random() < 0.2:
        return random.randbytes(random.randrange(room + 1))
    first = [0] if random.random() < 0.6 else []  # the device, where it is a worker that speaks
    thing: object = [random.choice(kinds), *first, *(_thing(random) for _ in range(random.randrange(4)))]
    if random.random() < 0.1:
        thing = _thing(random)
    raw = bytearray(msgpack.packb(thing))
    for _ in range(random.choice((0, 0, 0, 1, 2))):
        if raw:
            raw[random.randrange(len(raw))] ^= 1 << random.randrange(8)
    if random.random() < 0.1:
        raw += random.randbytes(random.randrange(8))
    return bytes(raw[:room])


def _thing(random: Random, depth: int = 0) -> object:
    what = random.randrange(12 if depth < 3 else 9)
    if what < 4:
        return random.choice(_NUMBERS)
    if what < 6:
        return "text" * random.randrange(3)
    if what < 9:
        return random.choice((None, True, 1.5, b"bytes", 0, msgpack.ExtType(5, b"x")))
    if what < 11:
        return [_thing(random, depth + 1) for _ in range(random.randrange(10))]
    return {"key": _thing(random, depth + 1)}


class _Messages:
    """What all of them count: `chains` are messages, `broken` those that were refused."""

    def __init__(self) -> None:
        self.chains = self.broken = 0


class Unpack(_Messages):
    """What becomes of bytes before anybody acts by them."""

    name = "messages"

    def close(self) -> None:
        """Nothing to give back."""

    def run(self, random: Random) -> None:
        """One message. Raises BrokenPromise, or what unpack should not have raised."""
        self.chains += 1
        raw = message(random, COMPLETION_MESSAGE_BYTES, _NUMBERS)
        try:
            unpacked = unpack(raw)
        except ValueError:
            self.broken += 1
            return
        if not unpacked or type(unpacked[0]) is not int or any(type(one) not in (int, str) for one in unpacked):
            raise BrokenPromise(f"{unpacked!r} is no message")


class FuzzedMailbox(_Messages):
    """A worker in this process, and what it does about a message."""

    name = "mailbox"

    def __init__(self) -> None:
        """Its device does nothing; its queues are real."""
        super().__init__()
        with contextlib.ExitStack() as stack:
            driver = Driver(ram=0x10000)
            stack.callback(driver.close)
            mailbox, self._completions = create_pair("fuzz")
            for queue in (mailbox, self._completions):
                stack.callback(queue.close)
                stack.callback(queue.unlink)
            trace, end = (stack.enter_context(end) for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            trace.setblocking(False)
            self._trace = trace
            arguments = [
                *("--name", "vda", "--device", "0", "--memory-fd", str(os.dup(driver.memory.fd))),
                *("--ram", str(driver.memory.ram_bytes), "--control-fd", str(os.dup(driver.control.fd))),
                *("--mailbox", mailbox.name, "--completions", self._completions.name, "--trace-fd", str(end.fileno())),
                *("--launcher", str(os.getppid()), "--queue", str(driver.layouts[0])),
            ]
            self._worker = Worker(Options(arguments, {}), Device())
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Give the queues back."""
        self._stack.close()

    def run(self, random: Random) -> None:
        """One message. Raises what a worker should not raise."""
        self.chains += 1
        try:
            self._worker._obey(message(random, MAILBOX_MESSAGE_BYTES, list(ToWorker)))
        except LgmpError:
            self.broken += 1
        while self._completions.take() is not None:
            pass
        with contextlib.suppress(BlockingIOError):
            while self._trace.recv(1 << 16):
                pass


class FuzzedMailboxProcess(_Messages):
    """A worker process and its real mailbox: it ends with 0 when it is told to, or with 1 and says why."""

    name = "mailbox process"

    def __init__(self) -> None:
        """One process after another, as each is ended by a message that makes no sense."""
        super().__init__()
        self._source = os.open("/dev/zero", os.O_RDONLY)
        self._driver = Driver(ram=0x10000)

    def close(self) -> None:
        """Give the driver's memory back."""
        self._driver.close()
        os.close(self._source)

    def run(self, random: Random) -> None:
        """Some messages. Raises BrokenPromise."""
        options = [f"--source-fd={self._source}"]
        with WorkerProcess("workers.rng", self._driver, options, pass_fds=[self._source]).ready() as worker:
            for _ in range(MAILBOX_MESSAGES - 1):
                self.chains += 1
                worker.mailbox.post(message(random, MAILBOX_MESSAGE_BYTES, list(ToWorker)))
            worker.mailbox.post(pack(ToWorker.STOP))
            words: list[list[int | str]] = []
            with contextlib.suppress(Unexpected):  # there are no more: it has ended
                while True:
                    words.append(worker.next_message())
            code, said = worker.process.poll(), worker.errors()
            others = [word for word in words[:-1] if word[0] != ToLauncher.RESET_DONE]
            if code not in (0, 1) or "Traceback" in said or others:
                raise BrokenPromise(f"the worker ended with {code}, said {said!r} and {words}")
            if code:
                self.broken += 1
                if words[-1][0] != ToLauncher.FAILED or "makes no sense" not in str(words[-1][2]):
                    raise BrokenPromise(f"the worker ended, and said {words[-1]}")
        self._driver.reset()


class _Heard:
    """Who hears of a worker in the launcher's place."""

    ending = False

    def __init__(self) -> None:
        self.failures: list[str] = []
        self.quits = threading.Semaphore(0)

    def used(self) -> None:
        """No matter."""

    def kicked(self, worker: LaunchersWorker) -> None:
        """No matter."""

    def quit(self) -> None:
        """The last of some messages."""
        self.quits.release()

    def restarted(self, worker: LaunchersWorker, why: str) -> None:
        """It was to live on."""
        self.failures.append(f"restarted: {why}")

    def broken(self, worker: LaunchersWorker, why: str) -> None:
        """No matter."""

    def failed(self, text: str) -> None:
        """A message made no sense, and that is said."""
        self.failures.append(text)


class FuzzedLauncher(_Messages):
    """The launcher's end of a worker's queues."""

    name = "launcher"

    def __init__(self) -> None:
        """A supervisor with one worker, in whose name we speak."""
        super().__init__()
        with contextlib.ExitStack() as stack:
            memory = stack.enter_context(GuestMemory.create(0x10000))
            source = os.open("/dev/zero", os.O_RDONLY)
            stack.callback(os.close, source)
            device = LguestBus(memory).add_device(ids.VIRTIO_ID_RNG, "rng0", [ids.VIRTQUEUE_NUM], 0, b"")
            self._heard = _Heard()
            self._waker = Waker()
            supervisor = Supervisor(memory, "fuzz", self._waker, self._heard)
            stack.callback(supervisor.close)
            stack.callback(self._waker.close)
            specification = WorkerSpecification("workers.rng", (f"--source-fd={source}",), (source,))
            self._worker = supervisor.start(device, specification)
            self._waker.start()
            stack.callback(supervisor.stop, PATIENCE)
            deadline = monotonic() + PATIENCE
            while not self._worker.was_ready:  # or a READY of ours would take its queues' names from it
                if monotonic() > deadline:
                    raise BrokenPromise("the worker does not start")
                sleep(0.005)
            self._stack = stack.pop_all()

    def close(self) -> None:
        """End the worker. Raises what the waker raised, if anything."""
        self._stack.close()

    def run(self, random: Random) -> None:
        """Some messages. Raises BrokenPromise."""
        completions = self._worker.current.completions
        for raw in [*(message(random, COMPLETION_MESSAGE_BYTES, list(ToLauncher)) for _ in range(10)), None]:
            if raw is not None:
                self.chains += 1
            elif self._heard.quits.acquire(blocking=False):
                while self._heard.quits.acquire(blocking=False):
                    pass
            if not completions.send(raw if raw is not None else pack(ToLauncher.QUIT, 0), PATIENCE):
                raise BrokenPromise("the launcher takes no messages any more")
        if not self._heard.quits.acquire(timeout=PATIENCE):
            raise BrokenPromise("the launcher does not act by a message any more")
        failures, self._heard.failures = self._heard.failures, []
        for text in failures:
            self.broken += 1
            if "makes no sense" not in text:
                raise BrokenPromise(f"the launcher said {text!r}")
