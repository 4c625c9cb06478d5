"""Starts the workers, passes messages to and from them, and sees them end.

A worker is exec'd, not forked, with a command line that says what it is. Everything it needs is open when it
starts: guest memory, its control page and its backing are inherited descriptors. The launcher trusts no worker: a
message that makes no sense ends the guest, it does not end the launcher.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from lgmp.bus import BusDevice
from lgmp.control import ControlPage
from lgmp.errors import LgmpError
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
from lgmp.virtio.ring import VringLayout
from lgmp.waker import Waker

_KICK = pack(ToWorker.KICK)
_RESET = pack(ToWorker.RESET)
_STOP = pack(ToWorker.STOP)

# A worker holds these back until it has said what it does about them: what the terminal sends reaches it too.
_HELD_BACK_WHILE_STARTING = {
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGTSTP,
    signal.SIGTTIN,
    signal.SIGTTOU,
}


@dataclass(frozen=True, slots=True)
class WorkerSpecification:
    """What to start: `module` for `python -m`, the device's own `options`, the descriptors to inherit."""

    module: str
    options: tuple[str, ...] = ()
    descriptors: tuple[int, ...] = ()
    has_terminal: bool = False  # whether stdin and stdout are its own to use


@dataclass(slots=True)
class Worker:
    """One worker and what belongs to it."""

    device: BusDevice
    process: subprocess.Popen[bytes]
    mailbox: Mailbox
    control: ControlPage
    pidfd: int
    ended: threading.Event = field(default_factory=threading.Event)
    reset_done: threading.Event = field(default_factory=threading.Event)
    ready: bool = False
    failure: str | None = None
    # Whether the driver has begun to work with what it accepted, which is in the control page then.
    negotiated: bool = False

    @property
    def title(self) -> str:
        """How messages name it."""
        return f"worker {self.device.name} (pid {self.process.pid})"

    def describe_end(self) -> str:
        """How it ended, for a person: its own last words, its exit code or its signal."""
        if self.failure is not None:
            return self.failure
        code = self.process.returncode
        if code is None:
            return f"{self.title} still runs"
        if code < 0:
            with contextlib.suppress(ValueError):
                return f"{self.title} was killed by {signal.Signals(-code).name}"
            return f"{self.title} was killed by signal {-code}"
        return f"{self.title} exited with code {code}"


class Supervisor:
    """The workers of one guest."""

    def __init__(
        self,
        memory: GuestMemory,
        guest_name: str,
        waker: Waker,
        *,
        options: Sequence[str] = (),
        on_used: Callable[[], None],
        on_quit: Callable[[], None],
        on_failure: Callable[[str], None],
    ) -> None:
        """Nothing runs yet; `options` go to every worker. The three functions are called in the waker's thread.

        `on_used()`: there is something in `used`; `on_quit()`: the user asked for the end; `on_failure(text)`: a worker
        ended that should not have, or sent what makes no sense. Raises LgmpError where no message queue can be had.
        """
        self._memory = memory
        self._guest_name = guest_name
        self._waker = waker
        self._options = options
        self._on_used = on_used
        self._on_quit = on_quit
        self._on_failure = on_failure
        self._stopping = False
        self.workers: list[Worker] = []
        # Which rings got used elements since the guest's thread looked: (device index, queue number).
        self.used: set[tuple[int, int]] = set()
        # The numbers of the signals that workers were killed by.
        self.killed_by: set[int] = set()
        self._completions = Mailbox.create(
            queue_name(os.getpid(), "done"), COMPLETION_MESSAGES, COMPLETION_MESSAGE_BYTES
        )
        waker.watch(self._completions.fileno(), self._take_completions)

    def start(self, device: BusDevice, specification: WorkerSpecification) -> Worker:
        """Start the worker of `device`, whose index must be the number of workers so far. Before the waker starts.

        Raises LgmpError where it cannot be started.
        """
        with contextlib.ExitStack() as undo:
            mailbox = Mailbox.create(queue_name(os.getpid(), device.name), MAILBOX_MESSAGES, MAILBOX_MESSAGE_BYTES)
            undo.callback(mailbox.close)
            undo.callback(mailbox.unlink)
            control = ControlPage.create()
            undo.callback(control.close)
            process = self._spawn(device, specification, mailbox, control)
            undo.callback(process.wait)
            undo.callback(process.kill)
            worker = Worker(device, process, mailbox, control, os.pidfd_open(process.pid))
            undo.pop_all()
        self.workers.append(worker)
        self._waker.watch(worker.pidfd, lambda: self._see_end(worker))
        return worker

    def _spawn(
        self, device: BusDevice, specification: WorkerSpecification, mailbox: Mailbox, control: ControlPage
    ) -> subprocess.Popen[bytes]:
        command = [
            *(sys.executable, "-P", "-m", specification.module),
            *("--name", device.name),
            *("--guest", self._guest_name),
            *("--device", str(device.index)),
            *("--memory-fd", str(self._memory.fd)),
            *("--ram", str(self._memory.ram_bytes)),
            *("--control-fd", str(control.fd)),
            *("--mailbox", mailbox.name),
            *("--completions", self._completions.name),
            *("--launcher", str(os.getpid())),
            *_queue_options(device),
            *self._options,
            *specification.options,
        ]
        old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_BACK_WHILE_STARTING)
        try:
            return subprocess.Popen(
                command,
                stdin=None if specification.has_terminal else subprocess.DEVNULL,
                stdout=None if specification.has_terminal else subprocess.DEVNULL,
                pass_fds=(self._memory.fd, control.fd, *specification.descriptors),
            )
        except OSError as error:
            raise LgmpError(f"cannot start the worker of {device.name}: {error}") from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)

    def kick(self, worker: Worker) -> None:
        """Have a worker look at its rings. Never blocks: a full mailbox means that a kick waits there already."""
        if not worker.negotiated:
            # Before 3.x a driver writes what it accepts after the last status that it tells of before its first kick.
            self.negotiated(worker)
            worker.negotiated = True
        worker.mailbox.post(_KICK)

    def negotiated(self, worker: Worker) -> None:
        """Tell a worker what its driver accepted, as the driver has written it by now, of what was offered."""
        worker.control.accepted_features = worker.device.accepted_features

    def reset(self, worker: Worker, give_up: Callable[[], bool]) -> bool:
        """Have a worker let go of its rings, and wait until it has; False where it ended instead, or `give_up()`.

        The guest's thread calls this while the guest waits in its NOTIFY.
        """
        worker.reset_done.clear()
        if not self._send(worker, _RESET, give_up):
            return False
        while not worker.reset_done.wait(0.1):
            if worker.ended.is_set() or give_up():
                return False
        self.used.difference_update([used for used in self.used if used[0] == worker.device.index])
        worker.negotiated = False
        return True

    def stop(self, patience: float | None) -> None:
        """Have all workers finish what is in their rings and exit, and wait for it.

        `patience`: after so many seconds in all they are killed; None: wait for as long as their output takes.
        """
        self._stopping = True
        deadline = None if patience is None else time.monotonic() + patience

        def give_up() -> bool:
            return deadline is not None and time.monotonic() >= deadline

        # Those that have room first: none has to wait for another that is stuck.
        full = [worker for worker in self.workers if not worker.mailbox.post(_STOP)]
        for worker in full:
            self._send(worker, _STOP, give_up)
        for worker in self.workers:
            while not worker.ended.wait(0.1):
                if give_up():
                    self.kill()

    def kill(self) -> None:
        """Kill whatever runs, at once."""
        self._stopping = True
        for worker in self.workers:
            if not worker.ended.is_set():
                worker.process.kill()

    def close(self) -> None:
        """Kill what still runs, and give everything back. After the waker has ended."""
        for worker in self.workers:
            if worker.process.returncode is None:
                worker.process.kill()
                worker.process.wait()
            worker.mailbox.unlink()
            worker.mailbox.close()
            os.close(worker.pidfd)
            worker.control.close()
        self._completions.unlink()
        self._completions.close()

    def _send(self, worker: Worker, message: bytes, give_up: Callable[[], bool]) -> bool:
        """Send what must not be lost, waiting for room; False where the worker has ended, or `give_up()` says so."""
        while not worker.mailbox.send(message, timeout=0.1):
            if worker.ended.is_set() or give_up():
                return False
        return not worker.ended.is_set()

    def _take_completions(self) -> None:
        """In the waker: everything that workers have said."""
        used = False
        while (raw := self._completions.take()) is not None:
            try:
                used |= self._heard(unpack(raw))
            except (ValueError, IndexError, TypeError):
                self._on_failure(f"a worker sent a message that makes no sense: {raw[:32]!r}")
        if used:
            self._on_used()

    def _heard(self, message: Sequence[int | str]) -> bool:
        """One message; whether it says that a ring has used elements.

        Raises ValueError, IndexError or TypeError for nonsense.
        """
        kind, index = ToLauncher(int(message[0])), message[1]
        if not isinstance(index, int) or not 0 <= index < len(self.workers):
            raise ValueError("no such device")
        worker = self.workers[index]
        match kind:
            case ToLauncher.USED:
                queue = message[2]
                if not isinstance(queue, int) or not 0 <= queue < len(worker.device.queues):
                    raise ValueError("no such queue")
                self.used.add((index, queue))
                return True
            case ToLauncher.READY:
                worker.ready = True
                worker.mailbox.unlink()
                if all(other.ready for other in self.workers):
                    self._completions.unlink()
            case ToLauncher.RESET_DONE:
                worker.reset_done.set()
            case ToLauncher.QUIT:
                self._on_quit()
            case ToLauncher.FAILED:
                worker.failure = str(message[2])
        return False

    def _see_end(self, worker: Worker) -> None:
        """In the waker: a worker has ended. What it said last comes first."""
        if worker.process.poll() is None:
            return
        self._waker.forget(worker.pidfd)
        self._take_completions()
        worker.mailbox.unlink()
        worker.ended.set()
        if worker.process.returncode and worker.process.returncode < 0:
            self.killed_by.add(-worker.process.returncode)
        if not self._stopping:
            self._on_failure(worker.describe_end())
        elif worker.process.returncode and worker.failure is not None:
            self._on_failure(worker.failure)


def _queue_options(device: BusDevice) -> Iterable[str]:
    for queue in device.queues:
        layout = VringLayout.legacy(queue.num, queue.pfn << 12)
        yield "--queue"
        yield f"{layout.num}:{layout.desc:#x}:{layout.avail:#x}:{layout.used:#x}"
