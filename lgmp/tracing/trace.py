"""`lgmp trace` and `lgmp record`: what goes through the rings of a device of a running guest."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType, TracebackType
from typing import IO, Protocol, Self

import lgmp
from lgmp.control_socket import Guest, find_guest
from lgmp.errors import LgmpError, say
from lgmp.tracing import wire
from lgmp.tracing.decoding import Clock, Pairing, Request, console_text, duration, frame, latency, note, words
from lgmp.tracing.events import Done, Event, Finish, Lost, Reset, Start, Take, parse
from lgmp.tracing.pcapng import Direction, PcapngWriter
from lgmp.tracing.recording import Header, Writer
from lgmp.virtio import console, net

# How long a launcher may take to begin, in seconds.
_PATIENCE = 5.0
_MAX_PACKET = 1 << 18
# For how long after ^C what is told meanwhile is still read, in seconds.
_AFTERWARDS = 1.0

STDOUT = "-"
_UNANSWERED = "not answered"


class _Interrupt:
    """Takes the first ^C, so that it ends a trace in order; the second is a KeyboardInterrupt again."""

    def __init__(self) -> None:
        # When it came.
        self.came: float | None = None
        self._stack = contextlib.ExitStack()
        self.descriptor, self._bell = os.pipe()
        for end in (self.descriptor, self._bell):
            os.set_blocking(end, False)
            self._stack.callback(os.close, end)

    @property
    def long_ago(self) -> bool:
        """Whether there was time enough since."""
        return self.came is not None and time.monotonic() > self.came + _AFTERWARDS

    def __enter__(self) -> Self:
        """Begin."""
        old = signal.signal(signal.SIGINT, self._interrupted)
        self._stack.callback(signal.signal, signal.SIGINT, old)
        # A poll is not ended by a handler that returns.
        bell = signal.set_wakeup_fd(self._bell, warn_on_full_buffer=False)
        self._stack.callback(signal.set_wakeup_fd, bell)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave ^C to whom it was before."""
        self._stack.close()

    def _interrupted(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.came is not None:
            raise KeyboardInterrupt
        self.came = time.monotonic()


class Trace:
    """A trace of a device that is under way. `header` is what is traced."""

    def __init__(self, guest: Guest, device: str, level: int) -> None:
        """Begin it. Raises LgmpError."""
        self._guest = guest
        self._socket = socket.socket(fileno=guest.request_descriptor("trace", device, level))
        try:
            session, header = self._begin()
        except BaseException:
            self._socket.close()
            raise
        self.header = header
        self._assembler = wire.Assembler(session)

    def _begin(self) -> tuple[int, Header]:
        """Pass over what another trace has left there."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        while poll.poll(_PATIENCE * 1000):
            packet = self._socket.recv(_MAX_PACKET, socket.MSG_DONTWAIT)
            if not packet:
                break
            try:
                found = wire.header_of(packet)
                if found is not None:
                    return found[0], Header.unpack(found[1])
            except ValueError as error:
                raise LgmpError(f"the trace makes no sense: {error}; is the guest's lgmp another one?") from error
        raise LgmpError(f"the launcher {self._guest.pid} has ended, or does not begin the trace")

    def events(self, idle: Callable[[], None] = lambda: None) -> Iterator[tuple[Event, list[object]]]:
        """The events as they come, each with its array, until ^C or the end of the guest.

        What the worker has told by then still comes. `idle` is called whenever there are none for now. Raises LgmpError
        where the worker tells nonsense.
        """
        with _Interrupt() as interrupt:
            yield from self._events(interrupt, idle)

    def _events(self, interrupt: _Interrupt, idle: Callable[[], None]) -> Iterator[tuple[Event, list[object]]]:
        poll = select.poll()
        poll.register(interrupt.descriptor, select.POLLIN)
        poll.register(self._socket, select.POLLIN)
        assert self._guest.connection is not None
        poll.register(self._guest.connection, select.POLLIN)
        while not interrupt.long_ago:
            try:
                packet = self._socket.recv(_MAX_PACKET, socket.MSG_DONTWAIT)
            except BlockingIOError:
                if interrupt.came is not None:
                    return
                idle()
                ready = dict(poll.poll())
                if self._socket.fileno() not in ready and interrupt.came is None:
                    return  # the launcher has ended, or this connection to it
                continue
            if not packet:
                return
            try:
                raw = self._assembler.take(packet)
                if raw is None:
                    continue
                event = parse(raw)
                self.header.check_event(event)
            except ValueError as error:
                raise LgmpError(f"the worker of {self.header.device} tells nonsense: {error}") from error
            if isinstance(event, Finish):
                return
            yield event, raw

    def close(self) -> None:
        """End it."""
        self._socket.close()
        self._guest.close()


class _Output(Protocol):
    """What becomes of a trace."""

    def event(self, event: Event, clock: Clock) -> None:
        """Something that is no request."""

    def request(self, request: Request, clock: Clock, fate: str) -> None:
        """A request: `fate` is how long it took, or what became of it where it has no `done`."""

    def flush(self) -> None:
        """Nothing more comes for now."""


class _Lines:
    """A line for each request."""

    def __init__(self, file: IO[bytes], kind: str) -> None:
        self._file = file
        self._kind = kind

    def _line(self, text: str) -> None:
        self._file.write(f"{text.rstrip()}\n".encode(errors="backslashreplace"))

    def event(self, event: Event, clock: Clock) -> None:
        text = note(event)
        if text is not None:
            self._line(f"{clock.show(event.time)}  {text}")

    def request(self, request: Request, clock: Clock, fate: str) -> None:
        self._line(f"{clock.show(request.take.time)}  {words(self._kind, request)}  {fate:>8}")

    def flush(self) -> None:
        self._file.flush()


class _Capture:
    """The frames of a network device."""

    def __init__(self, file: IO[bytes], header: Header) -> None:
        self._file = file
        interface = f"{header.device} of {header.guest}"
        self._writer = PcapngWriter(file, interface, f"lgmp {lgmp.__version__}")

    def event(self, event: Event, clock: Clock) -> None:
        pass

    def request(self, request: Request, clock: Clock, fate: str) -> None:  # noqa: ARG002
        data, size = frame(request)
        if not size:
            return
        if request.take.queue == net.TRANSMIT_QUEUE:
            self._writer.frame(clock.wall(request.take.time), data, size, Direction.OUT)
        elif request.done is not None:
            self._writer.frame(clock.wall(request.done.time), data, size, Direction.IN)

    def flush(self) -> None:
        self._file.flush()


class _Text:
    """What a guest writes on its console, as it is."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def event(self, event: Event, clock: Clock) -> None:
        pass

    def request(self, request: Request, clock: Clock, fate: str) -> None:  # noqa: ARG002
        if request.take.queue == console.OUTPUT_QUEUE:
            self._file.write(console_text(request))

    def flush(self) -> None:
        self._file.flush()


def trace(which: str | None, device: str, path: str | None) -> int:
    """Show what goes through the rings of a device until ^C, or the end of the guest; gives the exit status.

    `path`: the file it goes to, "-" or None for stdout. Raises LgmpError.
    """
    with contextlib.ExitStack() as stack:
        guest = find_guest(which)
        stack.callback(guest.close)
        level = _level(guest, device, path)
        running = Trace(guest, device, level)
        stack.callback(running.close)
        file = _open(path, stack)
        output = _output(running.header, file, path)
        count = _Count("tracing", running.header)
        _follow(running, output, count)
        output.flush()
        say(f"{running.header.device}: {count}")
    return 0


def _level(guest: Guest, device: str, path: str | None) -> int:
    """How much to ask for: a capture and a console's text are whole."""
    workers = guest.status["workers"] if guest.status is not None else []
    kind = next((worker["kind"] for worker in workers if worker["name"] == device), None)
    if kind == "console" or (kind == "net" and path is not None):
        return wire.PAYLOADS
    return wire.HEADS


def _output(header: Header, file: IO[bytes], path: str | None) -> _Output:
    if path is not None and header.kind == "net":
        return _Capture(file, header)
    if path is not None and header.kind == "console":
        return _Text(file)
    return _Lines(file, header.kind)


def _open(path: str | None, stack: contextlib.ExitStack) -> IO[bytes]:
    if path in (None, STDOUT):
        return sys.stdout.buffer
    assert path is not None
    try:
        # What a guest has on its disk and its wires is its owner's alone.
        return stack.enter_context(
            open(path, "wb", opener=lambda name, flags: os.open(name, flags | os.O_CLOEXEC, 0o600))
        )
    except OSError as error:
        raise LgmpError(f"Failed to open {path}: {error.strerror}") from error


class _Count:
    """What a trace comes to."""

    def __init__(self, doing: str, header: Header) -> None:
        self._begun = f"{doing} {header.device} of {header.guest}; ^C ends it"
        self.requests = 0
        self.lost = 0
        self.first: int | None = None
        self.last = 0

    def saw(self, event: Event) -> None:
        if self.first is None:
            self.first = event.time
            say(self._begun)
        self.last = max(self.last, event.time)
        if isinstance(event, Lost):
            self.lost += event.events

    def __str__(self) -> str:
        took = f" in {duration(self.last - self.first)}" if self.first is not None and self.requests else ""
        return f"{self.requests} requests{took}, {self.lost} events lost"


def _follow(running: Trace, output: _Output, count: _Count) -> None:
    """Have `output` show all that comes, until ^C or the end."""
    pairing = Pairing()
    clock = Clock()

    def give_up(requests: Sequence[Request], why: str) -> None:
        for request in requests:
            # A buffer that waits for something to come in is no request as yet.
            if request.take.readable:
                output.request(request, clock, why)
            else:
                count.requests -= 1

    for event, _raw in running.events(output.flush):
        count.saw(event)
        match event:
            case Start():
                give_up(pairing.start(event), "answered")
                clock.start(event)
            case Take():
                count.requests += pairing.take(event) is not None
            case Done():
                request = pairing.done(event)
                if request is not None:
                    output.request(request, clock, latency(request))
            case _:
                output.event(event, clock)
                if isinstance(event, Reset):
                    give_up(pairing.reset(), _UNANSWERED)
    give_up(pairing.open, _UNANSWERED)


def record(which: str | None, device: str, path: str) -> int:
    """Keep all that goes through the rings of a device, until ^C or the end of the guest; gives the exit status.

    Raises LgmpError.
    """
    with contextlib.ExitStack() as stack:
        guest = find_guest(which)
        stack.callback(guest.close)
        running = Trace(guest, device, wire.FULL)
        stack.callback(running.close)
        file = _open(path, stack)
        writer = Writer(file, running.header)
        count = _Count("recording", running.header)
        for event, raw in running.events(file.flush):
            count.saw(event)
            count.requests += isinstance(event, Take)
            writer.write(raw)
        file.flush()
        lost = "; what follows a loss cannot be replayed" if count.lost else ""
        say(f"{running.header.device}: {count}{lost}")
    return 0
