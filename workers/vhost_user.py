"""A process around one device that is served to a virtual machine monitor: vhost-user is its bus.

Front ends come by a listening socket, one at a time, or there is one connection alone. What they say is
lgmp.vhost_user.backend's to understand. Here are the socket, the kicks and the calls: one thread, which sleeps in one
epoll.

A kick is edge-triggered, so that an eventfd need not be read. While there is something to do the driver is asked not to
kick, and only before this process sleeps is it asked to again, with a look whether it has gone on meanwhile.

Before that it looks at the rings for a moment longer, as long as this pays (busy_wait.py), unless the device itself
waits for a descriptor.
"""

from __future__ import annotations

import _socket
import errno
import os
import select
import signal
from array import array
from time import monotonic

from lgmp.control import INTERRUPTS, KICKS, ControlPage
from lgmp.errors import LgmpError, say
from lgmp.vhost_user.backend import Backend
from lgmp.vhost_user.messages import HEADER_BYTES, MAX_DESCRIPTORS, Message, ProtocolError, name_of, parse_header
from lgmp.virtio.ring import RingError
from workers.busy_wait import BusyWait
from workers.device import Complaints

TYPE_CHECKING = False  # as typing's, which is costly to import in a worker
if TYPE_CHECKING:
    from collections.abc import Sequence

    from lgmp.confinement import Confinement
    from lgmp.vhost_user.backend import Vring
    from lgmp.virtio.ring import Virtqueue
    from workers.device import Device
    from workers.runtime import Options

# What has been begun is finished, after SIGTERM, if it takes no longer than this, in seconds.
_PATIENCE = 2.0
# How long an answer may take to be read, in seconds; it is a few bytes, and the front end waits for it.
_REPLY_PATIENCE = 5
# One wait tells of so many descriptors at most; by itself it would make room for a thousand.
_MOST_EVENTS = 16
_INT_BYTES = array("i").itemsize
_CALL = 1

_epoll = select.epoll


class IdleRing:
    """What a device has in the place of a ring that is not served now: there is never anything in it."""

    indirect = False
    interrupts_suppressed = True
    num = 0
    waiting = 0
    view = memoryview(b"")

    def __init__(self, name: str) -> None:
        """`name` as of a Virtqueue."""
        self.name = name

    def pop(self) -> None:
        """Nothing."""

    def push(self, _head: int, _written: int) -> None:
        """There is no chain to give back."""
        raise AssertionError(self.name)

    def push_all(self, _answers: Sequence[tuple[int, int]]) -> None:
        """As `push`."""
        raise AssertionError(self.name)

    def peek(self, _most: int, _header: int, _trailer: int) -> None:
        """Nothing."""

    def heads_in_flight(self) -> list[int]:
        """None."""
        return []

    def resume(self) -> None:
        """Nothing to take over."""

    def reset(self) -> None:
        """Nothing to forget."""


class Channel:
    """A connection to a front end. Its bytes come as they please, a message is handed out once it is whole."""

    def __init__(self, connection: _socket.socket) -> None:
        """`connection`: a stream socket of AF_UNIX, which this object then owns."""
        connection.setblocking(False)
        self._socket = connection
        self._received = bytearray()
        self._descriptors: list[int] = []
        self._head: tuple[int, int, int] | None = None

    def fileno(self) -> int:
        """To be polled."""
        return self._socket.fileno()

    def receive(self) -> Message | None:
        """The next message, None where it is not there yet. Raises EOFError at the end, ProtocolError and OSError."""
        if self._head is None:
            if not self._fill(HEADER_BYTES):
                return None
            self._head = parse_header(bytes(self._received))
            self._received.clear()
        request, flags, size = self._head
        if not self._fill(size):
            return None
        message = Message(request, flags, bytes(self._received), self._descriptors)
        self._received.clear()
        self._descriptors = []
        self._head = None
        return message

    def _fill(self, size: int) -> bool:
        """Read until there are `size` bytes; False where they have not all come yet."""
        while len(self._received) < size:
            try:
                data, ancillary, flags, _ = self._socket.recvmsg(
                    size - len(self._received),
                    _socket.CMSG_SPACE(MAX_DESCRIPTORS * _INT_BYTES),
                    _socket.MSG_CMSG_CLOEXEC,
                )
            except (BlockingIOError, InterruptedError):
                return False
            for level, kind, content in ancillary:
                if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
                    self._descriptors += array("i", content[: len(content) // _INT_BYTES * _INT_BYTES])
            if flags & _socket.MSG_CTRUNC or len(self._descriptors) > MAX_DESCRIPTORS:
                raise ProtocolError(f"more than {MAX_DESCRIPTORS} descriptors with one message")
            if not data:
                if self._received or self._head:
                    what = name_of(self._head[0]) if self._head else "a message"
                    raise ProtocolError(f"the connection has ended in the middle of {what}")
                raise EOFError
            self._received += data
        return True

    def send(self, data: bytes, descriptor: int | None) -> None:
        """Answer; `descriptor` goes with it. Raises OSError, also where nobody reads it."""
        ancillary = []
        if descriptor is not None:
            ancillary = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, array("i", [descriptor]))]
        deadline = monotonic() + _REPLY_PATIENCE
        while data:
            try:
                data = data[self._socket.sendmsg([data], ancillary, _socket.MSG_NOSIGNAL) :]
                ancillary = []
            except (BlockingIOError, InterruptedError):
                poll = select.poll()
                poll.register(self._socket, select.POLLOUT)
                left = deadline - monotonic()
                if left <= 0 or not poll.poll(left * 1000):
                    raise OSError(errno.ETIMEDOUT, "it does not read its answers") from None

    def close(self) -> None:
        """Hang up."""
        self._socket.close()
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []


class Server:
    """One device, and whoever it is served to."""

    def __init__(self, options: Options, device: Device) -> None:
        """Open what `options` name and give `device` rings that are empty. Raises LgmpError."""
        assert options.vhost_user_fd is not None
        self._name = options.name
        self._device = device
        self._features = options.virtio_features
        self._config = options.config_space
        self._queue_count = options.queue_count
        self._once = options.once
        self._complain = Complaints(say)
        try:
            self._own = _socket.socket(fileno=options.vhost_user_fd)
            is_listening = self._own.getsockopt(_socket.SOL_SOCKET, _socket.SO_ACCEPTCONN)
            if self._own.family != _socket.AF_UNIX or self._own.type & 0xF != _socket.SOCK_STREAM:
                raise LgmpError(f"descriptor {options.vhost_user_fd} is no stream socket of AF_UNIX")
        except OSError as error:
            raise LgmpError(f"descriptor {options.vhost_user_fd} is no socket: {error.strerror}") from error
        self._idle: list[IdleRing] = [IdleRing(f"{self._name}: queue {number}") for number in range(self._queue_count)]
        self._epoll = _epoll()
        self._wanted: dict[int, int] = {}
        # What epoll does not take, a regular file: it is always ready.
        self._always: list[tuple[int, int]] = []
        self._channel: Channel | None = None
        self._backend: Backend | None = None
        # Whether the front end has said anything.
        self._heard = False
        # Whether the device has let go of its rings, and is to be given those that are running.
        self._suspended = False
        self._running: list[Vring] = []
        self._queues: list[Virtqueue] = []
        # By their descriptors: the kicks of the rings that run.
        self._kicks: set[int] = set()
        # By the numbers of the rings: those that run.
        self._calls: list[Vring | None] = [None] * self._queue_count
        self._busy_wait = BusyWait()
        self._stopping = False
        self._bell, self._doorbell = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._epoll.register(self._bell, select.EPOLLIN)
        statistics = state = None
        if options.control_fd is not None:
            control = ControlPage(options.control_fd, ())
            statistics, state = control.statistics, control.state
        device.attach(self._idle, self, statistics=statistics, state=state)  # type: ignore[arg-type]
        if is_listening:
            self._own.setblocking(False)
            self._listener: _socket.socket | None = self._own
            self._epoll.register(self._own, select.EPOLLIN)
        else:
            self._listener = None
            self._connect(self._own)

    # What runtime.run asks of whatever is around a device.

    def confine(self, confinement: Confinement) -> None:
        """Be locked in and drop the rights. Raises LgmpError."""
        confinement.enter()

    def ready(self) -> None:
        """Front ends may have been waiting: the socket is older than this process."""
        signal.signal(signal.SIGTERM, self._terminate)
        signal.set_wakeup_fd(self._doorbell, warn_on_full_buffer=False)

    def failed(self, text: str) -> None:
        """Say why this process cannot go on."""
        say(text)

    def _terminate(self, _number: int, _frame: object) -> None:
        self._stopping = True

    # What a device asks of whatever is around it.

    def used(self, queue: int) -> None:
        """Used elements were added to ring `queue`: call the driver, if it wants that."""
        ring = self._calls[queue]
        if ring is None or ring.queue is None or not ring.queue.needs_call():
            return
        call = ring.call
        if call is not None:
            self._device.statistics[INTERRUPTS] += 1
            _signal(call)

    def quit(self) -> None:
        """The user has asked for the end, by three ^C: this process's."""
        self._stopping = True

    # What a back end asks of who serves the device.

    def suspend(self) -> None:
        """Let go of the rings, until the message that changes them is obeyed."""
        if self._suspended:
            return
        self._suspended = True
        if self._running:
            self._device.suspend()
        for ring in self._running:
            if ring.kick in self._kicks:
                self._epoll.unregister(ring.kick)
        self._kicks.clear()
        self._running = []
        self._queues = []
        self._calls = [None] * self._queue_count
        self._device.queues = self._idle  # type: ignore[assignment]  # they have all that a device calls

    def reset(self) -> None:
        """The driver reset the device, which keeps what it was given: a console's output is still written."""
        self._device.reset()
        self.suspend()

    def say(self, text: str) -> None:
        """A line, unless there were too many."""
        self._complain(text)

    # The loop

    def serve(self) -> None:
        """Serve whoever comes, until SIGTERM, or the end of the only one. Raises LgmpError."""
        device = self._device
        poll = self._epoll.poll
        kicks = self._kicks
        more = False
        while not self._stopping and (self._listener is not None or self._channel is not None):
            wanted = device.wants()
            if wanted or self._wanted or self._always:
                self._want(wanted)
            kicked = False
            for descriptor, events in poll(0 if more or self._always else None, _MOST_EVENTS):
                if descriptor in kicks:
                    kicked = True
                else:
                    self._see(descriptor, events)
            for descriptor, events in self._always:
                self._ready(descriptor, events)
            if self._suspended:
                more |= self._take_rings()
            if kicked:
                device.statistics[KICKS] += 1
            if kicked or more:
                more = self._serve_rings(may_wait=not wanted)
        if self._stopping:
            self._finish()

    def _serve_rings(self, *, may_wait: bool) -> bool:
        """Serve what is in the rings; gives whether there is more to do at once, as else there will be a kick."""
        queues = self._queues
        if not queues:
            return False
        for queue in queues:
            queue.look()
            queue.disable_kicks()
        try:
            if self._device.serve():
                return True
        except RingError as error:
            self._break(error)
            return False
        if may_wait and self._busy_wait(queues):
            return True
        more = False
        for queue in queues:
            if queue.enable_kicks():
                more = True
        return more

    def _finish(self) -> None:
        """End what has been begun, as far as that can be done soon."""
        device = self._device
        device.stop()
        deadline = monotonic() + _PATIENCE
        while device.busy and monotonic() < deadline:
            self._want(device.wants())
            for descriptor, events in self._epoll.poll(0 if self._always else deadline - monotonic()):
                if descriptor in self._wanted:
                    self._ready(descriptor, events)
            for descriptor, events in self._always:
                self._ready(descriptor, events)

    def _want(self, wanted: Sequence[tuple[int, int]]) -> None:
        """Watch the descriptors that the device waits for, and no others."""
        masks: dict[int, int] = {}
        for descriptor, events in wanted:
            masks[descriptor] = masks.get(descriptor, 0) | events
        if masks == self._wanted:
            return
        for descriptor in self._wanted.keys() - masks.keys():
            self._forget(descriptor)
        self._always = []
        for descriptor, events in masks.items():
            try:
                if descriptor in self._wanted:
                    self._epoll.modify(descriptor, events)
                else:
                    self._epoll.register(descriptor, events)
            except PermissionError:
                self._always.append((descriptor, events))
        self._wanted = masks

    def _forget(self, descriptor: int) -> None:
        try:  # noqa: SIM105  contextlib is costly to import
            self._epoll.unregister(descriptor)
        except OSError:
            pass  # epoll never took it, or the device has closed it

    def _see(self, descriptor: int, events: int) -> None:
        """Something other than a kick has happened."""
        if self._channel is not None and descriptor == self._channel.fileno():
            self._hear()
        elif self._listener is not None and descriptor == self._own.fileno():
            self._accept()
        elif descriptor == self._bell:
            os.read(self._bell, 4096)
        elif descriptor in self._wanted:
            self._ready(descriptor, events)

    def _ready(self, descriptor: int, events: int) -> None:
        try:
            self._device.ready(descriptor, events)
        except RingError as error:
            self._break(error)

    def _break(self, error: RingError) -> None:
        """The driver broke a rule: its rings are left alone from now on, until it has reset the device."""
        assert self._backend is not None
        say(f"{error}; the device is out of order until its driver resets it")
        broken = self._running
        self.suspend()
        self._backend.broken()
        self._device.reset()
        for ring in broken:
            if ring.error is not None:
                _signal(ring.error)

    # Front ends

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            descriptor, _ = self._own._accept()  # type: ignore[attr-defined]  # as socket.socket.accept calls it
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        self._connect(_socket.socket(fileno=descriptor))
        # One at a time: the next one waits in the listener's queue.
        self._epoll.unregister(self._own)

    def _connect(self, connection: _socket.socket) -> None:
        self._channel = Channel(connection)
        self._heard = False
        self._backend = Backend(
            self, name=self._name, features=self._features, config=self._config, queues=self._queue_count
        )
        self._epoll.register(self._channel.fileno(), select.EPOLLIN)

    def _hear(self) -> None:
        """Obey what the front end says, one message at a time: others wait less."""
        assert self._channel is not None
        assert self._backend is not None
        try:
            message = self._channel.receive()
            if message is None:
                return
            self._heard = True
            answer = self._backend.handle(message)
            if answer is not None:
                data, descriptor = answer
                try:
                    self._channel.send(data, descriptor)
                finally:
                    if descriptor is not None:
                        os.close(descriptor)
        except EOFError:
            self._hang_up()
        except LgmpError as error:  # it may also have asked for more than this machine has
            say(f"{self._name}: the front end is sent away: {error}")
            self._hang_up()
        except OSError as error:
            say(f"{self._name}: the front end is lost: {error.strerror or error}")
            self._hang_up()

    def _hang_up(self) -> None:
        """The front end has gone, or is to go: whatever it had here goes too."""
        assert self._channel is not None
        assert self._backend is not None
        self.suspend()
        self._suspended = False
        self._device.reset()
        self._backend.close()
        self._backend = None
        self._epoll.unregister(self._channel.fileno())
        self._channel.close()
        self._channel = None
        # Who says nothing is no front end: perhaps somebody who looks whether the socket is still served.
        if self._listener is not None and self._once and self._heard:
            self._listener.close()
            self._listener = None
        if self._listener is not None:
            self._epoll.register(self._listener, select.EPOLLIN)

    def _take_rings(self) -> bool:
        """Give the device the rings that are running now, some of them perhaps for the first time; gives True.

        The driver is called for each: whoever served them before may have answered, and not called.
        """
        assert self._backend is not None
        self._suspended = False
        device = self._device
        running = self._backend.running()
        if not running:
            return False
        rings: list[object] = list(self._idle)
        for ring in running:
            rings[ring.index] = ring.queue
        device.queues = rings  # type: ignore[assignment]
        self._running = running
        self._queues = [ring.queue for ring in running if ring.queue is not None]
        try:
            for ring in running:
                assert ring.kick is not None
                self._epoll.register(ring.kick, select.EPOLLIN | select.EPOLLET)
                self._kicks.add(ring.kick)
            for queue in self._queues:
                queue.resume()
            device.accept(self._backend.features)
            device.resume()
        except OSError as error:
            say(f"{self._name}: the front end is sent away: a descriptor for kicks is none: {error.strerror}")
            self._hang_up()
            return False
        except RingError as error:
            self._break(error)
            return False
        for ring in running:
            self._calls[ring.index] = ring
            self.used(ring.index)
        return True

    def close(self) -> None:
        """Hang up."""
        if self._channel is not None:
            self._hang_up()


def _signal(descriptor: int) -> None:
    """Add one to an eventfd of the front end's, which may be none and may be full: neither is our trouble."""
    try:  # noqa: SIM105  contextlib is costly to import
        os.eventfd_write(descriptor, _CALL)
    except OSError:
        pass  # full, so it is signalled; or no eventfd, so nobody hears
