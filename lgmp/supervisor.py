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
from typing import NamedTuple, Protocol

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


class WorkerSpecification(NamedTuple):
    """What to start: `module` for `python -m`, the device's own `options`, the descriptors to inherit."""

    module: str
    options: tuple[str, ...] = ()
    descriptors: tuple[int, ...] = ()
    has_terminal: bool = False  # whether stdin and stdout are its own to use


class Worker:
    """One worker and what belongs to it."""

    def __init__(
        self, device: BusDevice, process: subprocess.Popen[bytes], mailbox: Mailbox, control: ControlPage
    ) -> None:
        """It has been started just now."""
        self.device = device
        self.process = process
        self.mailbox = mailbox
        self.control = control
        # What tells of its end; None: SIGCHLD does.
        self.pidfd: int | None = None
        # An eventfd that the guest's kicks may come in by, past the launcher.
        self.kick_descriptor: int | None = None
        self.ended = threading.Event()
        self.reset_done = threading.Event()
        self.ready = False
        self.failure: str | None = None
        # Held while one thread sends a kick or begins a reset.
        self.lock = threading.Lock()
        # Whether a reset is under way: until it is over, the rings are nobody's.
        self.resetting = False
        # Whether the driver has begun to work with what it accepted, which is in the control page then.
        self.negotiated = False

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


class Listener(Protocol):
    """Who hears of the workers. All of it is called in the waker's thread."""

    def used(self) -> None:
        """There is something in `Supervisor.used`."""

    def kicked(self, worker: Worker) -> None:
        """Its guest kicked a worker past the launcher, and the worker does not know of a driver yet: kick it if so."""

    def quit(self) -> None:
        """The user asked for the end of the guest."""

    def failed(self, text: str) -> None:
        """A worker ended that should not have, or sent what makes no sense."""


class Supervisor:
    """The workers of one guest."""

    def __init__(
        self,
        memory: GuestMemory,
        guest_name: str,
        waker: Waker,
        listener: Listener,
        *,
        options: Sequence[str] = (),
        takes_kicks: bool = False,
    ) -> None:
        """Nothing runs yet; `options` go to every worker.

        `takes_kicks`: each worker is given an eventfd for the guest's kicks, where this machine has eventfds. Raises
        LgmpError where no message queue can be had.
        """
        self._memory = memory
        self._guest_name = guest_name
        self._waker = waker
        self._options = options
        self._takes_kicks = takes_kicks and hasattr(os, "eventfd")
        self._listener = listener
        self._stopping = False
        self.workers: list[Worker] = []
        # Which rings got used elements since the guest's thread looked: (device index, queue number).
        self.used: set[tuple[int, int]] = set()
        # The numbers of the signals that workers were killed by.
        self.killed_by: set[int] = set()
        self._completions = Mailbox.create(
            queue_name(os.getpid(), "done"), COMPLETION_MESSAGES, COMPLETION_MESSAGE_BYTES, polled=True
        )
        waker.watch(self._completions.fileno(), self._take_completions)
        self._has_pidfds = _has_pidfds()
        if not self._has_pidfds:
            # Before the first worker, so that the end of none is missed.
            waker.on_signal(signal.SIGCHLD, lambda _number: self._see_ends())
            self._old_child_handler = signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])

    def start(self, device: BusDevice, specification: WorkerSpecification) -> Worker:
        """Start the worker of `device`, whose index must be the number of workers so far. Before the waker starts.

        Raises LgmpError where it cannot be started.
        """
        with contextlib.ExitStack() as undo:
            mailbox = Mailbox.create(
                queue_name(os.getpid(), device.name), MAILBOX_MESSAGES, MAILBOX_MESSAGE_BYTES, polled=True
            )
            undo.callback(mailbox.close)
            undo.callback(mailbox.unlink)
            control = ControlPage.create()
            undo.callback(control.close)
            kick_descriptor = None
            if self._takes_kicks:
                kick_descriptor = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                undo.callback(os.close, kick_descriptor)
                specification = _with_kicks(specification, kick_descriptor)
            process = self._spawn(device, specification, mailbox, control)
            undo.callback(process.wait)
            undo.callback(process.kill)
            worker = Worker(device, process, mailbox, control)
            worker.kick_descriptor = kick_descriptor
            if self._has_pidfds:
                worker.pidfd = os.pidfd_open(process.pid)
            undo.pop_all()
        self.workers.append(worker)
        if worker.pidfd is not None:
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
        with worker.lock:
            if worker.resetting:
                return  # what was kicked is gone
            if not worker.negotiated:
                # Before 3.x a driver writes what it accepts after the last status that it tells of, before its first
                # kick.
                self.negotiated(worker)
                worker.negotiated = True
            worker.mailbox.post(_KICK)

    def negotiated(self, worker: Worker) -> None:
        """Tell a worker what its driver accepted, as the driver has written it by now, of what was offered."""
        worker.control.accepted_features = worker.device.accepted_features

    def reset(self, worker: Worker, give_up: Callable[[], bool]) -> None:
        """Reset a device: have its worker let go of its rings, wait until it has, and put the device back to its start.

        The guest's thread calls this while the guest waits in its NOTIFY. Where the worker ended instead, or
        `give_up()`, nothing more is done: the guest is about to end.
        """
        with worker.lock:
            worker.resetting = True
        try:
            if self._let_go(worker, give_up):
                worker.device.reset()
                worker.negotiated = False
        finally:
            worker.resetting = False

    def _let_go(self, worker: Worker, give_up: Callable[[], bool]) -> bool:
        worker.reset_done.clear()
        if not self._send(worker, _RESET, give_up):
            return False
        while not worker.reset_done.wait(0.1):
            if worker.ended.is_set() or give_up():
                return False
        self.used.difference_update([used for used in self.used.copy() if used[0] == worker.device.index])
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
            if worker.pidfd is not None:
                os.close(worker.pidfd)
            if worker.kick_descriptor is not None:
                os.close(worker.kick_descriptor)
            worker.control.close()
        if not self._has_pidfds:
            signal.signal(signal.SIGCHLD, self._old_child_handler or signal.SIG_DFL)
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
                self._listener.failed(f"a worker sent a message that makes no sense: {raw[:32]!r}")
        if used:
            self._listener.used()

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
            case ToLauncher.KICKED:
                self._listener.kicked(worker)
            case ToLauncher.QUIT:
                self._listener.quit()
            case ToLauncher.FAILED:
                worker.failure = str(message[2])
        return False

    def _see_ends(self) -> None:
        """In the waker, where there are no pidfds: a child has ended, or was stopped, or goes on."""
        for worker in self.workers:
            if not worker.ended.is_set():
                self._see_end(worker)

    def _see_end(self, worker: Worker) -> None:
        """In the waker: a worker has ended. What it said last comes first."""
        if worker.process.poll() is None:
            return
        if worker.pidfd is not None:
            self._waker.forget(worker.pidfd)
        self._take_completions()
        worker.mailbox.unlink()
        worker.ended.set()
        if worker.process.returncode and worker.process.returncode < 0:
            self.killed_by.add(-worker.process.returncode)
        if not self._stopping:
            self._listener.failed(worker.describe_end())
        elif worker.process.returncode and worker.failure is not None:
            self._listener.failed(worker.failure)


def _has_pidfds() -> bool:
    """Whether the end of a process can be watched by a descriptor: since Linux 5.3, where Python's libc knew of it."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        return False
    return True


def _with_kicks(specification: WorkerSpecification, descriptor: int) -> WorkerSpecification:
    return specification._replace(
        options=("--kick-fd", str(descriptor), *specification.options),
        descriptors=(descriptor, *specification.descriptors),
    )


def _queue_options(device: BusDevice) -> Iterable[str]:
    for queue in device.queues:
        layout = VringLayout.legacy(queue.num, queue.pfn << 12)
        yield "--queue"
        yield f"{layout.num}:{layout.desc:#x}:{layout.avail:#x}:{layout.used:#x}"
