"""Starts the workers, passes messages to and from them, sees them end, and starts them again.

A worker is exec'd, not forked, with a command line that says what it is. Everything it needs is open when it
starts: guest memory, its control page and its backing are inherited descriptors. The launcher trusts no worker: a
message that makes no sense ends the guest, it does not end the launcher.

A worker that ends before it is told to is started again, at once or after a while, and goes on from its control page.
One that keeps ending and gets nothing done is given up. All of that happens in the waker's thread; the guest's, which
kicks and resets devices, never waits for it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from typing import NamedTuple, Protocol

from lgmp.bus import BusDevice
from lgmp.control import INTERRUPTS, ControlPage
from lgmp.errors import LgmpError
from lgmp.mailbox import Mailbox, ToLauncher, ToWorker, create_pair, pack, unpack
from lgmp.memory import GuestMemory
from lgmp.restarts import Restarts, describe_end
from lgmp.tracing import wire
from lgmp.virtio.ring import VringLayout
from lgmp.waker import Waker

_KICK = pack(ToWorker.KICK)
_RESET = pack(ToWorker.RESET)
_STOP = pack(ToWorker.STOP)

# A worker holds these back until it has said what it does about them: what the terminal sends reaches it too.
HELD_BACK_WHILE_STARTING = {
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGTSTP,
    signal.SIGTTIN,
    signal.SIGTTOU,
}


# How often a socket that is full of an old trace is emptied, and when a worker that takes no messages now is told again
# of a trace, in seconds.
_TRACE_ATTEMPTS = 10
_DRAIN_PACKETS = 100_000
_TRACE_AGAIN = 0.02


class WorkerSpecification(NamedTuple):
    """What to start: `module` for `python -m`, the device's own `options`, the descriptors to inherit.

    `before_restart` is called before it is started again.
    """

    module: str
    options: tuple[str, ...] = ()
    descriptors: tuple[int, ...] = ()
    has_terminal: bool = False  # whether stdin and stdout are its own to use
    before_restart: Callable[[], None] = lambda: None


class WorkerState(StrEnum):
    """What a device's worker is doing, in words for people."""

    STARTING = "starting"
    RUNNING = "running"
    WAITING = "waiting"  # ended, and to be started again in a moment
    GIVEN_UP = "given up"
    ENDED = "ended"


class Incarnation:
    """One process that serves a device, and the message queues that were made for it."""

    def __init__(self, process: subprocess.Popen[bytes], mailbox: Mailbox, completions: Mailbox) -> None:
        """It has been started just now."""
        self.process = process
        self.mailbox = mailbox
        self.completions = completions
        # What tells of its end; None: SIGCHLD does.
        self.pidfd: int | None = None
        self.started = time.monotonic()
        # Its own last words.
        self.failure: str | None = None
        self.reset_done = threading.Event()
        self.ended = threading.Event()
        # Whether its end was asked for, and is no crash.
        self.replaced = False

    def unlink(self) -> None:
        """Take the names of its queues away; who has them open keeps them."""
        self.mailbox.unlink()
        self.completions.unlink()

    def close(self) -> None:
        """Give its descriptors back, once it has ended. The names of its queues may be its successor's by now."""
        self.mailbox.close()
        self.completions.close()
        if self.pidfd is not None:
            os.close(self.pidfd)
            self.pidfd = None


class Worker:
    """A device's worker: one process after another, and what outlives them."""

    def __init__(
        self, device: BusDevice, specification: WorkerSpecification, control: ControlPage, kick_descriptor: int | None
    ) -> None:
        """None has been started yet."""
        self.device = device
        self.specification = specification
        self.control = control
        # An eventfd that the guest's kicks may come in by, past the launcher.
        self.kick_descriptor = kick_descriptor
        # What goes through the rings comes out of the first when somebody asks for that; the second is the worker's.
        self.trace, self.workers_trace = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # How much of that it tells, and to whom: lgmp.tracing.wire.setting.
        self.tracing = wire.OFF
        self.state = WorkerState.STARTING
        self.restarts = 0
        # Whether any of its processes has come as far as to serve it.
        self.was_ready = False
        # The last thing that went wrong with it or its driver.
        self.error: str | None = None
        # Whether its driver broke a rule: its rings are nobody's until the driver resets it.
        self.broken = False
        self.current: Incarnation
        # Held while one thread sends a kick, begins a reset, or puts another incarnation in the place of one.
        self.lock = threading.Lock()
        # Whether a reset is under way: until it is over, the rings are nobody's.
        self.resetting = False
        # What becomes of it when it ends.
        self.history = Restarts()

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The process that serves it now, or did last."""
        return self.current.process

    @property
    def out_of_order(self) -> bool:
        """Whether the driver gets no answers any more until it resets the device."""
        return self.broken or self.state == WorkerState.GIVEN_UP

    @property
    def title(self) -> str:
        """How messages name it."""
        return f"worker {self.device.name} (pid {self.process.pid})"

    def done(self) -> tuple[int, ...]:
        """Numbers that change when a request was answered, or a new one taken."""
        return tuple(number for region in self.control.inflight for number in (region.taken(), region.used_idx))

    def describe_end(self) -> str:
        """How it ended, for a person: its own last words, its exit code or its signal."""
        if self.current.failure is not None:
            return self.current.failure
        return describe_end(self.title, self.process.returncode)

    def drain_trace(self) -> None:
        """Throw away what is told of its rings and not read yet, as far as that has come."""
        with contextlib.suppress(BlockingIOError):
            for _packet in range(_DRAIN_PACKETS):
                self.trace.recv(1, socket.MSG_DONTWAIT)  # the rest of a packet is lost

    def close(self) -> None:
        """Give back what outlives its processes, of which there are none any more."""
        self.current.unlink()
        self.current.close()
        for end in (self.trace, self.workers_trace):
            end.close()
        if self.kick_descriptor is not None:
            os.close(self.kick_descriptor)
        self.control.close()


class Listener(Protocol):
    """Who hears of the workers. All of it is called in the waker's thread."""

    @property
    def ending(self) -> bool:
        """Whether the end of the guest has come, so that no worker is started again."""

    def used(self) -> None:
        """There is something in `Supervisor.used`."""

    def kicked(self, worker: Worker) -> None:
        """Its guest kicked a worker past the launcher, and the worker does not know of a driver yet: kick it if so."""

    def quit(self) -> None:
        """The user asked for the end of the guest."""

    def restarted(self, worker: Worker, why: str) -> None:
        """A worker ended, as `why` tells, and another is in its place."""

    def broken(self, worker: Worker, why: str) -> None:
        """A device is out of order; `why` is what the driver did, or the worker."""

    def failed(self, text: str) -> None:
        """A worker ended that should not have, and is not to be started again, or sent what makes no sense."""


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
        on_crash: str = "restart",
    ) -> None:
        """Nothing runs yet; `options` go to every worker.

        `takes_kicks`: each worker is given an eventfd for the guest's kicks, where this machine has eventfds.
        `on_crash`: "restart" a worker that ends of itself or is killed, or "stop".
        """
        self._memory = memory
        self._guest_name = guest_name
        self._waker = waker
        self._options = options
        self._takes_kicks = takes_kicks and hasattr(os, "eventfd")
        self._on_crash = on_crash
        self._listener = listener
        self._stopping = False
        self.workers: list[Worker] = []
        # What has ended, and could not be closed at once.
        self._past: list[Incarnation] = []
        # Which rings got used elements since the guest's thread looked: (device index, queue number).
        self.used: set[tuple[int, int]] = set()
        # The numbers of the signals that workers were killed by.
        self.killed_by: set[int] = set()
        # How many traces there were.
        self._traces = 0
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
            control = ControlPage.create([queue.num for queue in device.queues])
            undo.callback(control.close)
            kick_descriptor = None
            if self._takes_kicks:
                kick_descriptor = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                undo.callback(os.close, kick_descriptor)
            worker = Worker(device, specification, control, kick_descriptor)
            undo.callback(worker.trace.close)
            undo.callback(worker.workers_trace.close)
            self._spawn(worker)
            undo.pop_all()
        self.workers.append(worker)
        return worker

    def _spawn(self, worker: Worker) -> None:
        """Start a process for a worker that has none. Raises LgmpError, with nothing changed."""
        # Held throughout: a reset finds either that there is no process, or this one, which may read `live` as soon as
        # it is there.
        with worker.lock, contextlib.ExitStack() as undo:
            mailbox, completions = create_pair(worker.device.name, polled=True)
            for queue in (mailbox, completions):
                undo.callback(queue.close)
                undo.callback(queue.unlink)
            process = self._exec(worker, mailbox, completions)
            undo.callback(process.wait)
            undo.callback(process.kill)
            incarnation = Incarnation(process, mailbox, completions)
            if self._has_pidfds:
                incarnation.pidfd = os.pidfd_open(process.pid)
            undo.pop_all()
            worker.history.started(worker.done())
            worker.current = incarnation
            worker.state = WorkerState.STARTING
        self._waker.watch(completions.fileno(), lambda: self._take_completions(worker, incarnation))
        if incarnation.pidfd is not None:
            self._waker.watch(incarnation.pidfd, lambda: self._see_end(worker, incarnation))

    def _exec(self, worker: Worker, mailbox: Mailbox, completions: Mailbox) -> subprocess.Popen[bytes]:
        device, specification = worker.device, worker.specification
        descriptors = [
            *(self._memory.fd, worker.control.fd, worker.workers_trace.fileno()),
            *specification.descriptors,
        ]
        kicks: tuple[str, ...] = ()
        if worker.kick_descriptor is not None:
            descriptors.append(worker.kick_descriptor)
            kicks = ("--kick-fd", str(worker.kick_descriptor))
        command = [
            *(sys.executable, "-P", "-m", specification.module),
            *("--name", device.name),
            *("--guest", self._guest_name),
            *("--device", str(device.index)),
            *("--memory-fd", str(self._memory.fd)),
            *("--ram", str(self._memory.ram_bytes)),
            *("--control-fd", str(worker.control.fd)),
            *("--mailbox", mailbox.name),
            *("--completions", completions.name),
            *("--trace-fd", str(worker.workers_trace.fileno())),
            *(("--trace", str(worker.tracing)) if worker.tracing else ()),
            *kicks,
            *("--launcher", str(os.getpid())),
            *_queue_options(device),
            *self._options,
            *specification.options,
        ]
        old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK_WHILE_STARTING)
        try:
            return subprocess.Popen(
                command,
                stdin=None if specification.has_terminal else subprocess.DEVNULL,
                stdout=None if specification.has_terminal else subprocess.DEVNULL,
                pass_fds=descriptors,
            )
        except OSError as error:
            raise LgmpError(f"cannot start the worker of {device.name}: {error}") from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)

    def kick(self, worker: Worker) -> None:
        """Have a worker look at its rings. Never blocks: a full mailbox means that a kick waits there already.

        Where there is no worker just now, its successor looks at them first thing.
        """
        with worker.lock:
            if worker.resetting or worker.broken:
                return  # what was kicked is gone
            if not worker.control.live:
                # Before 3.x a driver writes what it accepts after the last status that it tells of, before its first
                # kick.
                self.negotiated(worker)
                worker.control.live = True
            self._post(worker.current, _KICK)

    def negotiated(self, worker: Worker) -> None:
        """Tell a worker what its driver accepted, as the driver has written it by now, of what was offered."""
        worker.control.accepted_features = worker.device.accepted_features

    def count_interrupt(self, index: int) -> None:
        """An interrupt was sent for the device with that index."""
        self.workers[index].control.statistics[INTERRUPTS] += 1

    def reset(self, worker: Worker, give_up: Callable[[], bool]) -> None:
        """Reset a device: have its worker let go of its rings, wait until it has, and put the device back to its start.

        The guest's thread calls this while the guest waits in its NOTIFY. A device that was broken is so no longer.
        Where `give_up()` says so nothing more is done: the guest is about to end.
        """
        with worker.lock:
            worker.resetting = True
            # A process that starts from now on leaves the rings alone.
            worker.control.live = False
            incarnation = worker.current
        try:
            if not self._let_go(incarnation, give_up):
                return
            self.used.difference_update([used for used in self.used.copy() if used[0] == worker.device.index])
            worker.control.reset()
            worker.device.reset()
            worker.broken = False
            if worker.state == WorkerState.GIVEN_UP:
                worker.history.forgive()
                why = f"{worker.device.name} was reset by its driver"
                self._waker.call_later(0, lambda: self._start_again(worker, why))
        finally:
            worker.resetting = False

    def _let_go(self, incarnation: Incarnation, give_up: Callable[[], bool]) -> bool:
        """Have a process let go of its rings; False where `give_up()`. One that has ended has."""
        incarnation.reset_done.clear()
        if not self._send(incarnation, _RESET, give_up):
            return incarnation.ended.is_set()
        while not incarnation.reset_done.wait(0.1):
            if incarnation.ended.is_set():
                return True
            if give_up():
                return False
        return True

    def trace(self, worker: Worker, level: int, header: bytes) -> int:
        """Have a worker tell what goes through its rings, until `trace_ended`; its successors too. In the waker.

        Gives the descriptor by which it does, which stays the launcher's; `header` comes first. Raises LgmpError where
        somebody reads that already.
        """
        if worker.tracing:
            raise LgmpError(f"{worker.device.name} is being traced already: end that trace (^C) first")
        if worker.state == WorkerState.GIVEN_UP:
            name = worker.device.name
            raise LgmpError(f"{name} has no worker any more: `lgmp restart-worker {name}` gives it another")
        self._traces += 1
        worker.workers_trace.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, wire.SOCKET_BYTES)
        packet = wire.header_packet(self._traces, header)
        for _attempt in range(_TRACE_ATTEMPTS):
            worker.drain_trace()  # of what nobody has read of the trace before
            with contextlib.suppress(BlockingIOError):
                worker.workers_trace.send(packet, socket.MSG_DONTWAIT)
                break
        else:
            raise LgmpError(f"the trace of {worker.device.name} before this one has not ended yet: try again")
        worker.tracing = wire.setting(level, self._traces)
        self._tell_of_trace(worker)
        return worker.trace.fileno()

    def trace_ended(self, worker: Worker) -> None:
        """Nobody reads what a worker tells of its rings. In the waker."""
        worker.tracing = wire.OFF
        self._tell_of_trace(worker)
        worker.drain_trace()

    def _tell_of_trace(self, worker: Worker) -> None:
        """Tell a worker how much to tell; where it has no room for messages now, in a moment."""
        incarnation = worker.current
        if not incarnation.ended.is_set() and not self._post(incarnation, pack(ToWorker.TRACE, worker.tracing)):
            self._waker.call_later(_TRACE_AGAIN, lambda: self._tell_of_trace(worker))

    def restart(self, worker: Worker) -> None:
        """Have a worker end, at once, and another take its place. In the waker."""
        if worker.current.ended.is_set():
            worker.history.forgive()
            self._start_again(worker, f"{worker.title} is replaced as asked")
        else:
            worker.current.replaced = True
            worker.process.kill()

    def stop(self, patience: float | None) -> None:
        """Have all workers finish what is in their rings and exit, and wait for it.

        `patience`: after so many seconds in all they are killed; None: wait for as long as their output takes.
        """
        self._stopping = True
        deadline = None if patience is None else time.monotonic() + patience

        def give_up() -> bool:
            return deadline is not None and time.monotonic() >= deadline

        # Those that have room first: none has to wait for another that is stuck.
        told = [worker.current for worker in self.workers if self._post(worker.current, _STOP)]
        for worker in self.workers:
            while True:
                incarnation = worker.current
                # One that has just taken the place of another has not been told either.
                if incarnation not in told:
                    self._send(incarnation, _STOP, give_up)
                    told.append(incarnation)
                if incarnation.ended.wait(0.1):
                    break
                if give_up():
                    self.kill()

    def kill(self) -> None:
        """Kill whatever runs, at once."""
        self._stopping = True
        for worker in self.workers:
            if not worker.current.ended.is_set():
                worker.process.kill()

    def close(self) -> None:
        """Kill what still runs, and give everything back. After the waker has ended."""
        for worker in self.workers:
            if worker.process.returncode is None:
                worker.process.kill()
                worker.process.wait()
            worker.close()
        for incarnation in self._past:
            incarnation.close()
        if not self._has_pidfds:
            signal.signal(signal.SIGCHLD, self._old_child_handler or signal.SIG_DFL)

    @staticmethod
    def _post(incarnation: Incarnation, message: bytes) -> bool:
        """Send without waiting; False where there is no room, or nobody to read it."""
        return not incarnation.ended.is_set() and incarnation.mailbox.post(message)

    def _send(self, incarnation: Incarnation, message: bytes, give_up: Callable[[], bool]) -> bool:
        """Send what must not be lost, waiting for room; False where the process has ended, or `give_up()` says so."""
        while not incarnation.ended.is_set():
            if incarnation.mailbox.send(message, timeout=0.1):
                return True
            if give_up():
                return False
        return False

    def _take_completions(self, worker: Worker, incarnation: Incarnation) -> None:
        """In the waker: everything that a worker has said."""
        used = False
        while (raw := incarnation.completions.take()) is not None:
            try:
                used |= self._heard(worker, incarnation, unpack(raw))
            except (ValueError, IndexError, TypeError):
                self._listener.failed(f"{worker.title} sent a message that makes no sense: {raw[:32]!r}")
                return
        if used:
            self._listener.used()

    def _heard(self, worker: Worker, incarnation: Incarnation, message: Sequence[int | str]) -> bool:
        """One message; whether it says that a ring has used elements.

        Raises ValueError, IndexError or TypeError for nonsense.
        """
        kind, index = ToLauncher(int(message[0])), message[1]
        if index != worker.device.index:
            raise ValueError("not its device")
        match kind:
            case ToLauncher.USED:
                queue = message[2]
                if not isinstance(queue, int) or not 0 <= queue < len(worker.device.queues):
                    raise ValueError("no such queue")
                self.used.add((index, queue))
                return True
            case ToLauncher.READY:
                incarnation.unlink()
                worker.state = WorkerState.RUNNING
                worker.was_ready = True
            case ToLauncher.RESET_DONE:
                incarnation.reset_done.set()
            case ToLauncher.KICKED:
                self._listener.kicked(worker)
            case ToLauncher.QUIT:
                self._listener.quit()
            case ToLauncher.FAILED:
                incarnation.failure = str(message[2])
            case ToLauncher.BROKEN:
                self._break(worker, str(message[2]))
        return False

    def _break(self, worker: Worker, why: str) -> None:
        """The driver of a device broke a rule, and gets no answers any more until it resets it."""
        with worker.lock:
            if worker.resetting:
                return  # it is being reset already
            worker.error = why
            worker.broken = True
            worker.control.live = False
        self._listener.broken(worker, why)

    def _see_ends(self) -> None:
        """In the waker, where there are no pidfds: a child has ended, or was stopped, or goes on."""
        for worker in self.workers:
            if not worker.current.ended.is_set():
                self._see_end(worker, worker.current)

    def _see_end(self, worker: Worker, incarnation: Incarnation) -> None:
        """In the waker: a process has ended. What it said last comes first."""
        code = incarnation.process.poll()
        if code is None:
            return
        if incarnation.pidfd is not None:
            self._waker.forget(incarnation.pidfd)
        # Before anything else comes of its end: it may have said that its driver broke a rule.
        self._take_completions(worker, incarnation)
        self._waker.forget(incarnation.completions.fileno())
        incarnation.unlink()
        why = worker.describe_end()
        was_ready = worker.state == WorkerState.RUNNING
        with worker.lock:
            worker.state = WorkerState.ENDED
            incarnation.ended.set()
        if code < 0:
            self.killed_by.add(-code)
        if self._stopping or self._listener.ending:
            if code and incarnation.failure is not None:
                self._listener.failed(incarnation.failure)
            return
        if incarnation.replaced:
            self._start_again(worker, f"{worker.title} is replaced as asked")
            return
        worker.error = why
        cannot_start = not worker.was_ready and code >= 0
        if self._on_crash == "stop" or cannot_start:
            self._listener.failed(why)
            return
        pause = worker.history.pause(code, worker.done(), was_ready=was_ready)
        if pause is None:
            self._give_up(worker, f"{why}; it keeps ending")
        elif pause:
            worker.state = WorkerState.WAITING
            self._waker.call_later(pause, lambda: self._start_again(worker, why))
        else:
            self._start_again(worker, why)

    def _give_up(self, worker: Worker, why: str) -> None:
        """Leave a device without a worker. Its rings stay as they are, for `restart`."""
        worker.state = WorkerState.GIVEN_UP
        worker.error = f"{why}, and is given up"
        self._listener.broken(worker, worker.error)

    def _start_again(self, worker: Worker, why: str) -> None:
        """In the waker: start another process for a worker whose last one has ended."""
        if self._stopping or self._listener.ending or not worker.current.ended.is_set():
            return
        old = worker.current
        try:
            worker.specification.before_restart()
            self._spawn(worker)
        except (LgmpError, OSError) as error:
            self._give_up(worker, f"{why}; it has no successor ({error})")
            return
        with worker.lock:
            if worker.resetting:
                self._past.append(old)  # its queues are still in use
            else:
                old.close()
        worker.restarts += 1
        self._listener.restarted(worker, why)
        # What it had put into the rings it may not have had the time to tell of.
        self.used.update((worker.device.index, queue) for queue in range(len(worker.device.queues)))
        self._listener.used()


def _has_pidfds() -> bool:
    """Whether the end of a process can be watched by a descriptor: since Linux 5.3, where Python's libc knew of it."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        return False
    return True


def _queue_options(device: BusDevice) -> Iterable[str]:
    for queue in device.queues:
        layout = VringLayout.legacy(queue.num, queue.pfn << 12)
        yield "--queue"
        yield f"{layout.num}:{layout.desc:#x}:{layout.avail:#x}:{layout.used:#x}"
