"""The control socket of a launcher, by which its user sees and commands a guest: both of its ends.

It is a SOCK_SEQPACKET socket named PID.sock in the user's runtime directory. A request is one packet, a msgpack array
[COMMAND, ARGUMENT...]; so is its answer, a map {"ok": VALUE} or {"error": TEXT}, with a descriptor beside it where the
command is "trace". A connection may stay open for any number of them.

Who may connect is the user alone, by the rights of the directory and the socket, and root; both ends look who the other
is. Still nothing that comes is trusted: a packet has a largest size, and a connection that does not read is closed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import socket
import struct
import time
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import msgpack

from lgmp.errors import LgmpError
from lgmp.guest_status import is_status
from lgmp.mailbox import unlink_queues_of
from lgmp.runtime_directory import RuntimeDirectory
from lgmp.waker import Waker

MAX_REQUEST_BYTES = 4096
# The status of a guest with as many devices as an lguest bus takes is a fifth of this.
MAX_ANSWER_BYTES = 1 << 17
MAX_CONNECTIONS = 16
# Connections that wait to be accepted.
_BACKLOG = 64
# The longest text, and the most elements, in a request.
_MAX_TEXT_BYTES = 1024
_MAX_ELEMENTS = 8

# Seconds in which a launcher that is well has answered long since.
PATIENCE = 2.0

# struct ucred: pid, uid, gid.
_CREDENTIALS = struct.Struct("3i")
_ROOT = 0

_NAME = re.compile(r"(\d+)\.sock")
# A socket that is bound, but refuses connections as yet.
_NEW_NAME = re.compile(r"(\d+)\.new")

# A guest's name, or a path, is any bytes.
_TEXT_ERRORS = "surrogateescape"


class Commands(Protocol):
    """What may be asked of a launcher. All of it is called in the waker's thread, and must not block.

    What a user can understand and mend is raised as LgmpError; its text goes to who asked.
    """

    def status(self) -> dict[str, object]:
        """Everything there is to see, as msgpack takes it."""

    def stop(self) -> None:
        """End the guest."""

    def pause(self) -> None:
        """Have the guest stand still."""

    def resume(self) -> None:
        """Have the guest go on."""

    def restart_worker(self, name: str) -> None:
        """Replace the worker of a device by a new one."""

    def trace(self, name: str, level: int) -> int:
        """Have a worker trace its device; gives the descriptor by which it does, which stays the launcher's."""

    def trace_ended(self, name: str) -> None:
        """Nobody reads that trace any more."""


# Server


class _Client:
    """A connection as the server has it."""

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        # The devices whose traces it has.
        self.traces: set[str] = set()


class ControlServer:
    """The launcher's end: serves whoever connects, in the waker's thread."""

    def __init__(self, waker: Waker, commands: Commands) -> None:
        """Make the socket, which is served once the waker runs. Raises LgmpError where it cannot be had."""
        self._waker = waker
        self._commands = commands
        self._clients: dict[int, _Client] = {}
        # For closing, so that there is a descriptor to accept (and refuse) a connection with where they have run out.
        self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, self._spare)
            self._listener = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            self._name = f"{os.getpid()}.sock"
            self._directory = self._listen()
            undo.pop_all()
        waker.watch(self._listener.fileno(), self._accept)

    @property
    def path(self) -> str:
        """Where the socket is."""
        return self._directory.join(self._name)

    def _listen(self) -> RuntimeDirectory:
        """Give the socket its name, in the directory that this gives."""
        while True:
            directory = RuntimeDirectory.make()
            try:
                sweep(directory)
                self._bind(directory)
            except OSError as error:
                directory.close()
                # A launcher that was the last in it has just taken the directory away.
                if isinstance(error, FileNotFoundError) and not os.path.exists(directory.path):
                    continue
                raise LgmpError(f"{directory.join(self._name)}: {error.strerror}") from error
            return directory

    def _bind(self, directory: RuntimeDirectory) -> None:
        # Under its name it takes connections from the first moment: who finds one that does not, takes it away.
        new = f"{os.getpid()}.new"
        directory.unlink(new)
        self._listener.setblocking(False)
        self._listener.bind(directory.address(new))
        try:
            os.chmod(directory.address(new), 0o600)
            self._listener.listen(_BACKLOG)
            directory.rename(new, self._name)
        except OSError:
            directory.unlink(new)
            raise

    def close(self) -> None:
        """Take the socket away and end all connections. After the waker has ended."""
        # In this order: there is never one of that name that refuses connections.
        with contextlib.suppress(OSError):
            self._directory.unlink(self._name)
        self._listener.close()
        for client in self._clients.values():
            client.socket.close()
        self._clients.clear()
        self._directory.remove()
        self._directory.close()
        os.close(self._spare)

    def _accept(self) -> None:
        try:
            connected, _address = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._refuse()
            return  # or whoever it was has gone again
        if _peer(connected).uid not in (os.geteuid(), _ROOT):
            connected.close()
            return
        connected.setblocking(False)
        client = _Client(connected)
        if len(self._clients) == MAX_CONNECTIONS:
            self._answer(client, {"error": f"there are {MAX_CONNECTIONS} connections to this guest already"})
            connected.close()
            return
        self._clients[connected.fileno()] = client
        self._waker.watch(connected.fileno(), lambda: self._serve(client))

    def _refuse(self) -> None:
        """Out of descriptors: take a connection and end it, or the waker would be woken for it for ever."""
        os.close(self._spare)
        with contextlib.suppress(OSError):
            self._listener.accept()[0].close()
        self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def _serve(self, client: _Client) -> None:
        """One packet of a client, or its end."""
        try:
            raw = client.socket.recv(MAX_REQUEST_BYTES + 1)
        except BlockingIOError:
            return
        except OSError:
            raw = b""
        if not raw or not self._obey(client, raw):
            self._drop(client)

    def _drop(self, client: _Client) -> None:
        self._waker.forget(client.socket.fileno())
        del self._clients[client.socket.fileno()]
        client.socket.close()
        for name in sorted(client.traces):
            self._commands.trace_ended(name)

    def _obey(self, client: _Client, raw: bytes) -> bool:
        """Do what a packet says, and answer; whether the client takes the answer."""
        descriptors: list[int] = []
        try:
            answer: dict[str, object] = {"ok": self._carry_out(client, *_parse_request(raw), descriptors)}
        except LgmpError as error:
            answer = {"error": str(error)}
        return self._answer(client, answer, descriptors)

    def _carry_out(self, client: _Client, what: str, arguments: list[int | str], descriptors: list[int]) -> object:
        commands = self._commands
        match what, arguments:
            case "status", []:
                return commands.status()
            case "stop", []:
                commands.stop()
            case "pause", []:
                commands.pause()
            case "resume", []:
                commands.resume()
            case "restart-worker", [str(name)]:
                commands.restart_worker(name)
            case "trace", [str(name), int(level)] if level > 0:
                descriptors.append(commands.trace(name, level))
                client.traces.add(name)
            case _:
                raise LgmpError(f"this launcher knows no request {what!r} of that form; is it of another lgmp?")
        return None

    def _answer(self, client: _Client, answer: dict[str, object], descriptors: Sequence[int] = ()) -> bool:
        """Whether the client took it. Never waits."""
        raw: bytes = msgpack.packb(answer, unicode_errors=_TEXT_ERRORS)
        if len(raw) > MAX_ANSWER_BYTES:
            raw = msgpack.packb({"error": f"the answer has {len(raw)} bytes, and {MAX_ANSWER_BYTES} is the most"})
        try:
            # Not send_fds, which takes no flags whatever it says, no more than recv_fds does.
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", descriptors))] if descriptors else []
            client.socket.sendmsg([raw], rights, socket.MSG_NOSIGNAL)
        except OSError:
            return False  # it does not read what it asked for, or has gone
        return True


def _parse_request(raw: bytes) -> tuple[str, list[int | str]]:
    """The command and the arguments of a packet from anybody. Raises LgmpError for what is no request."""
    if len(raw) > MAX_REQUEST_BYTES:
        raise LgmpError(f"a request has at most {MAX_REQUEST_BYTES} bytes")
    try:
        message = msgpack.unpackb(
            raw,
            max_array_len=_MAX_ELEMENTS,
            max_map_len=0,
            max_str_len=_MAX_TEXT_BYTES,
            max_bin_len=0,
            max_ext_len=0,
            unicode_errors=_TEXT_ERRORS,
        )
    except Exception as error:  # msgpack raises a dozen kinds, and what it is does not matter
        raise LgmpError("that is no request: it is not msgpack, or too much of it") from error
    # type() and not isinstance(): a bool is no integer here.
    if type(message) is not list or not message or any(type(element) not in (int, str) for element in message):
        raise LgmpError("that is no request: it is not an array of a command and its arguments")
    if type(message[0]) is not str:
        raise LgmpError("that is no request: it does not begin with a command")
    return message[0], message[1:]


class _Peer(NamedTuple):
    """Who is at the other end: struct ucred."""

    pid: int
    uid: int
    gid: int


def _peer(connected: socket.socket) -> _Peer:
    return _Peer(*_CREDENTIALS.unpack(connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)))


# Clients


class Connection:
    """A client's end of a connection to the launcher `pid`."""

    def __init__(self, connected: socket.socket, pid: int) -> None:
        """Take a connected socket; `connect` is what callers want."""
        self._socket = connected
        self.pid = pid
        # Whether the launcher's process ids are ours as well: it may be in a container.
        self.same_processes = _peer(connected).pid == pid

    def fileno(self) -> int:
        """The descriptor, for poll(2): readable where there is an answer, or the launcher has gone."""
        return self._socket.fileno()

    def send(self, command: str, *arguments: int | str) -> None:
        """Ask; the answer, or that the launcher has ended, is `receive`'s. Raises LgmpError where it takes no more."""
        raw = msgpack.packb([command, *arguments], unicode_errors=_TEXT_ERRORS)
        try:
            self._socket.send(raw, socket.MSG_NOSIGNAL)
        except BlockingIOError as error:
            raise LgmpError(_silent(self.pid)) from error
        except OSError:
            pass  # it has ended this connection, and may have said why

    def receive(self, timeout: float | None = PATIENCE) -> object:
        """The next answer, waiting so many seconds for it (None: for ever).

        Raises LgmpError, also for what the launcher has against the request.
        """
        answer, descriptors = self._receive(timeout)
        _close_all(descriptors)
        return answer

    def request(self, command: str, *arguments: int | str, timeout: float | None = PATIENCE) -> object:
        """Ask, and give the answer. Raises LgmpError."""
        self.send(command, *arguments)
        return self.receive(timeout)

    def request_descriptor(self, command: str, *arguments: int | str, timeout: float | None = PATIENCE) -> int:
        """Ask, and give the descriptor that comes with the answer, which is the caller's then. Raises LgmpError."""
        self.send(command, *arguments)
        _answer, descriptors = self._receive(timeout)
        if len(descriptors) != 1:
            raise LgmpError(f"no descriptor came from the launcher {self.pid}; allow more with `ulimit -n`")
        return descriptors[0]

    def close(self) -> None:
        """End the connection."""
        self._socket.close()

    def _receive(self, timeout: float | None) -> tuple[object, list[int]]:
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        if not poll.poll(None if timeout is None else timeout * 1000):
            raise LgmpError(_silent(self.pid))
        try:
            raw, descriptors = self._take()
        except OSError:
            raw, descriptors = b"", []
        if not raw:
            raise GoneError(f"the launcher {self.pid} has ended")
        try:
            answer = msgpack.unpackb(raw, unicode_errors=_TEXT_ERRORS)
            if "ok" in answer:
                return answer["ok"], descriptors
            text = str(answer["error"])
        except Exception:  # of whatever kind
            text = _nonsense(self.pid)
        _close_all(descriptors)
        raise LgmpError(text)

    def _take(self) -> tuple[bytes, list[int]]:
        for _attempt in range(2):
            with contextlib.suppress(ConnectionResetError):  # said once where it has ended; what it sent comes after
                raw, ancillary, _flags, _address = self._socket.recvmsg(
                    MAX_ANSWER_BYTES, socket.CMSG_LEN(array("i").itemsize), socket.MSG_CMSG_CLOEXEC
                )
                descriptors = array("i")
                for level, kind, data in ancillary:
                    if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                        descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
                return raw, list(descriptors)
        return b"", []


class GoneError(LgmpError):
    """The launcher has ended."""


def _close_all(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _silent(pid: int) -> str:
    return f"the launcher {pid} does not answer: it is just starting, or stopped (`kill -CONT {pid}`)"


def _nonsense(pid: int) -> str:
    return f"an answer of the launcher {pid} makes no sense; is it of another lgmp?"


def connect(directory: RuntimeDirectory, name: str, pid: int) -> Connection | None:
    """Connect to the socket `name` of the launcher `pid`; None where it is gone, or not to be trusted.

    A socket that no process has any more is taken away, with what names of queues its launcher has left. Raises
    LgmpError where the launcher takes no connection.
    """
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connected.setblocking(False)
    try:
        connected.connect(directory.address(name))
        if _peer(connected).uid in (os.geteuid(), _ROOT):
            return Connection(connected, pid)
    except BlockingIOError as error:
        connected.close()
        raise LgmpError(_silent(pid)) from error
    except ConnectionRefusedError:
        if directory.is_socket(name):
            with contextlib.suppress(OSError):
                directory.unlink(name)
            if not os.path.exists(f"/proc/{pid}"):
                unlink_queues_of(pid)
    except OSError:
        pass  # it is gone, or none of ours
    connected.close()
    return None


def sweep(directory: RuntimeDirectory) -> None:
    """Take away the sockets of launchers that are no more."""
    for name, pid in _launchers(directory):
        with contextlib.suppress(LgmpError):
            connection = connect(directory, name, pid)
            if connection is not None:
                connection.close()
    _sweep_new(directory)


def _launchers(directory: RuntimeDirectory) -> Iterable[tuple[str, int]]:
    """The names of sockets, with the process ids of those that made them."""
    with contextlib.suppress(OSError):
        for name in directory.names():
            if match := _NAME.fullmatch(name):
                yield name, int(match[1])


def _sweep_new(directory: RuntimeDirectory) -> None:
    """Take away the sockets of launchers that were killed while they made them."""
    with contextlib.suppress(OSError):
        for name in directory.names():
            match = _NEW_NAME.fullmatch(name)
            if match and directory.is_socket(name) and not os.path.exists(f"/proc/{match[1]}"):
                directory.unlink(name)


class Guest:
    """A guest whose launcher has a control socket."""

    def __init__(self, pid: int, connection: Connection | None, problem: str = "") -> None:
        """`pid` is the launcher's; `connection` is None where it takes none, and `problem` says why."""
        self.pid = pid
        self.connection = connection
        # What it said last, as guest_status.py has it, and when (time.monotonic); None where nothing came yet.
        self.status: dict[str, Any] | None = None
        self.heard = 0.0
        # Why it has not answered the last time it was asked; empty where it has.
        self.problem = problem
        # Whether an answer is still to come.
        self._asked = False

    @property
    def name(self) -> str | None:
        """What it is called; None where that is not known."""
        return None if self.status is None else str(self.status["name"])

    @property
    def pending(self) -> bool:
        """Whether its status was asked for and has not come yet."""
        return self._asked

    def ask(self) -> None:
        """Ask for its status, unless that is still to come."""
        if self.connection is not None and not self._asked:
            self.problem = _silent(self.pid)
            self.connection.send("status")
            self._asked = True

    def hear(self) -> None:
        """Take the answer to `ask`, which is there. Raises LgmpError where it is no status."""
        assert self.connection is not None
        self._asked = False
        self._note(self.connection.receive(0))

    def refresh(self) -> dict[str, Any]:
        """Its status of now. Raises LgmpError where there is none to be had."""
        return self._note(self.request("status"))

    def _note(self, status: object) -> dict[str, Any]:
        if not is_status(status):
            raise LgmpError(_nonsense(self.pid))
        self.status, self.heard, self.problem = status, time.monotonic(), ""
        return status

    def request(self, command: str, *arguments: int | str) -> object:
        """Ask it something, and give the answer. Raises LgmpError."""
        return self._connection().request(command, *arguments)

    def request_descriptor(self, command: str, *arguments: int | str) -> int:
        """Ask it for something that comes as a descriptor, the caller's then. Raises LgmpError."""
        return self._connection().request_descriptor(command, *arguments)

    def close(self) -> None:
        """End the connection."""
        if self.connection is not None:
            self.connection.close()

    def _connection(self) -> Connection:
        if self.connection is None or self._asked:
            raise LgmpError(self.problem)
        return self.connection


class Guests:
    """The guests of this user, looked at once or again and again over the same connections."""

    def __init__(self) -> None:
        """None is known yet."""
        self._guests: dict[int, Guest] = {}

    def look(self) -> None:
        """Find those that have come since."""
        for pid in [pid for pid, guest in self._guests.items() if guest.connection is None]:
            del self._guests[pid]
        for directory in RuntimeDirectory.existing():
            with directory:
                _sweep_new(directory)
                for name, pid in _launchers(directory):
                    if pid not in self._guests:
                        self._meet(directory, name, pid)

    def _meet(self, directory: RuntimeDirectory, name: str, pid: int) -> None:
        try:
            connection = connect(directory, name, pid)
        except LgmpError as error:
            self._guests[pid] = Guest(pid, None, str(error))
        else:
            if connection is not None:
                self._guests[pid] = Guest(pid, connection)

    def refresh(self, timeout: float = PATIENCE) -> None:
        """Ask all for their status, and wait so many seconds in all; those that have ended are forgotten."""
        poll = select.poll()
        pending: dict[int, Guest] = {}
        for guest in self._guests.values():
            try:
                guest.ask()
            except LgmpError as error:
                guest.problem = str(error)
            if guest.connection is not None and guest.pending:
                pending[guest.connection.fileno()] = guest
                poll.register(guest.connection, select.POLLIN)
        deadline = time.monotonic() + timeout
        while pending and (events := poll.poll(max(0.0, deadline - time.monotonic()) * 1000)):
            for descriptor, _events in events:
                poll.unregister(descriptor)
                guest = pending.pop(descriptor)
                try:
                    guest.hear()
                except GoneError:
                    self.forget(guest)
                except LgmpError as error:
                    guest.problem = str(error)

    def all(self) -> list[Guest]:
        """Those that are known, in the order of their process ids."""
        return [guest for _pid, guest in sorted(self._guests.items())]

    def pick(self, which: str | None) -> Guest:
        """The one whose launcher has the process id `which`, or whose name it is; None: the only one there is.

        Raises LgmpError where that is none, or more than one, or it does not answer.
        """
        guests = self.all()
        found = guests
        if which is not None:
            found = [guest for guest in guests if which == str(guest.pid)]
            found = found or [guest for guest in guests if guest.name == which]
        if not found:
            raise LgmpError(_none(which, guests))
        if len(found) > 1:
            what = "guests" if which is None else f"guests of the name {which}"
            which_of = ", ".join(str(guest.pid) if which else _introduce(guest) for guest in found)
            raise LgmpError(f"there are {len(found)} {what}: give the pid of one, of {which_of}")
        if found[0].status is None:
            raise LgmpError(found[0].problem)
        return found[0]

    def forget(self, guest: Guest) -> None:
        """End the connection to a guest, and know it no longer."""
        self._guests.pop(guest.pid).close()

    def keep(self, guest: Guest) -> None:
        """End the connections to all others."""
        for other in self.all():
            if other is not guest:
                self.forget(other)

    def close(self) -> None:
        """End all connections."""
        for guest in self.all():
            self.forget(guest)


def _none(which: str | None, guests: Sequence[Guest]) -> str:
    if not guests:
        return "no guest runs that is yours; `lgmp run` starts one"
    names = ", ".join(_introduce(guest) for guest in guests)
    return f"no guest has the name or the pid {which}; there is {names}"


def _introduce(guest: Guest) -> str:
    return f"{guest.pid} ({guest.name or 'which does not answer'})"


def guests() -> list[Guest]:
    """The guests of this user, each with its status, and a connection that is the caller's to close."""
    found = Guests()
    found.look()
    found.refresh()
    return found.all()


def find_guest(which: str | None) -> Guest:
    """The guest with that name or process id, or the only one, with its status and a connection to be closed.

    Raises LgmpError where that is none, or more than one, or it does not answer.
    """
    found = Guests()
    try:
        found.look()
        found.refresh()
        guest = found.pick(which)
    except LgmpError:
        found.close()
        raise
    found.keep(guest)
    return guest
